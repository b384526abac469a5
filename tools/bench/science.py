"""python tools/bench/science.py FOLDER [WAY ...]: which choices matter, on the Countdown run of
run_cpu.sh, over three seeds.

Every way is one process of ppo.py with the flags of run_cpu.sh, 30 steps (some 20) of 512 samples,
from the same warm models (tests/tiny.py, made when they are missing); two run at a time, a thread
each. Runs that are in FOLDER are not done again. Ends with a Markdown table of held-out accuracy
(512 problems, temperature 1), mean and range over the seeds, and FOLDER/science.png.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from planted import Bug, plant  # noqa: E402

SEEDS, STEPS, FEWER = (0, 1, 2), 30, 20
FLAGS = """
    --task countdown3 --prompts_per_step 128 --samples_per_prompt 4 --minibatch_size 256
    --max_prompt_tokens 32 --max_new_tokens 160 --max_tokens_per_microbatch 8000 --lr 1e-3
    --no_gradient_checkpointing --eval_every 10 --eval_rows 512
    """
CRITIC = "--critic_lr 2e-3 --critic_warmup 1"
# an engine that samples the training batch (n > 1) hotter than it was told; evaluation and canary
# are as ever
HOT = Bug(
    "hot",
    "rollout.py",
    "n=n,\n                    temperature=temperature,",
    "n=n,\n                    temperature=temperature * (1.5 if n > 1 else 1),",
    (),
)
# (20 steps: after so many in a row GUARDS of infra/guards.py end a run whose engine is more than 0.1
# nats a token off)
WAYS = {  # name: (flags, what is planted, panel; but for the first panel FEWER steps)
    "PPO": (CRITIC, None, "advantages"),
    "GRPO": ("--advantage grpo", None, "advantages"),
    "GRPO, 64 prompts x 8": (
        "--advantage grpo --prompts_per_step 64 --samples_per_prompt 8",
        None,
        "advantages",
    ),
    "RLOO": ("--advantage rloo", None, "advantages"),
    "REINFORCE++": ("--advantage reinforce++", None, "advantages"),
    "PPO, no critic warm-up": ("--critic_lr 2e-3", None, "critic warm-up"),
    "PPO, hot engine": (CRITIC, HOT, "engine 1.5 times too hot"),
    "PPO, hot engine, no correction": (f"{CRITIC} --tis_cap 0", HOT, "engine 1.5 times too hot"),
}
COLOURS = ["#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"]  # Okabe and Ito: for all eyes
STYLES = ["-", "--", (0, (5, 1, 1, 1)), ":", "-."]


def place(folder: Path, way: str, seed: int) -> Path:
    return folder / f"{way.replace(', ', '_').replace(' ', '-')}_{seed}"


def evaluations(folder: Path) -> dict[int, float]:
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in open(file)] if file.exists() else []
    return {row["step"]: row["eval/correct"] for row in rows if "eval/correct" in row}


def start(folder: Path, code: Path, way: str, seed: int) -> None:
    out, last = place(folder, way, seed), STEPS if WAYS[way][2] == "advantages" else FEWER
    if last in evaluations(out):
        return
    command = [
        sys.executable,
        code / "ppo.py",
        *FLAGS.split(),
        *WAYS[way][0].split(),
        "--steps",
        last,
    ]
    command += [
        "--model",
        folder / f"warm-{seed}",
        "--seed",
        seed,
        "--out",
        out,
        "--resume",
        "auto",
    ]
    print(" ".join(map(str, command)), flush=True)
    with open(f"{out}.log", "w") as log:
        subprocess.run([*map(str, command)], cwd=code, stdout=log, stderr=subprocess.STDOUT)
    print(f"{out.name}: {evaluations(out)}", flush=True)
    assert last in evaluations(out), f"{out}.log says why it ended"


def table(folder: Path, ways: list[str]) -> str:
    lines = [
        "| way | " + " | ".join(f"step {step}" for step in (0, 10, FEWER, STEPS)) + " |",
        "|---" * 5 + "|",
    ]
    for way in ways:
        found = [evaluations(place(folder, way, seed)) for seed in SEEDS]
        last = STEPS if WAYS[way][2] == "advantages" else FEWER
        columns = [[e[step] for e in found if step <= last] for step in (0, 10, FEWER, STEPS)]
        cells = [
            f"{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})" if c else "" for c in columns
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(folder: Path, ways: list[str]) -> None:
    panels = {"advantages": ["PPO"], "critic warm-up": ["PPO"], "engine 1.5 times too hot": ["PPO"]}
    for way in ways:
        panels[WAYS[way][2]] = [*dict.fromkeys([*panels[WAYS[way][2]], way])]
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=(4.2 * len(panels), 3.6))
    for axis, (title, drawn) in zip(axes, panels.items()):
        for way, colour, style in zip(drawn, COLOURS, STYLES):
            found = [evaluations(place(folder, way, seed)) for seed in SEEDS]
            steps = [step for step in sorted(set.intersection(*map(set, found))) if step <= STEPS]
            curves = [[e[step] for step in steps] for e in found]
            mean = [sum(column) / len(column) for column in zip(*curves)]
            axis.plot(steps, mean, linestyle=style, color=colour, label=way)
            low, high = ([*map(f, zip(*curves))] for f in (min, max))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axis.set(title=title, xlabel="step", ylim=(0, 0.8))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("held-out accuracy")
    figure.savefig(folder / "science.png", dpi=110, bbox_inches="tight")


def main(folder: Path, ways: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    for seed in SEEDS:
        if not (folder / f"warm-{seed}" / "config.json").exists():
            program = [
                sys.executable,
                ROOT / "tests" / "tiny.py",
                folder / f"warm-{seed}",
                "--seed",
                seed,
            ]
            subprocess.run(
                [*map(str, program)], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
            )
    with tempfile.TemporaryDirectory() as hot, ThreadPoolExecutor(2) as pool:
        plant(HOT, Path(hot))
        jobs = [(way, seed) for seed in SEEDS for way in ways]
        done = [
            pool.submit(start, folder, Path(hot) if WAYS[way][1] else ROOT, way, seed)
            for way, seed in jobs
        ]
        for job in done:
            job.result()
    print(table(folder, ways))
    picture(folder, ways)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or list(WAYS))
