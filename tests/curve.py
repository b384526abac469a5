"""python tests/curve.py RUN: RUN/curve.png from RUN/metrics.jsonl, and held-out accuracy before and after."""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

run = Path(sys.argv[1])
if not (run / "metrics.jsonl").exists():
    print("no steps, no curve")
    sys.exit()
rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
steps = [row for row in rows if "reward/mean" in row]
evals = [row for row in rows if "eval/correct" in row]

figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6))
top.plot([r["step"] for r in steps], [r["reward/correct"] for r in steps], color="0.6", label="training batch")
top.plot([r["step"] for r in evals], [r["eval/correct"] for r in evals], "o-", color="C0", label="held-out problems")
top.set(ylabel="fraction correct", ylim=(0, 1), title=run.name)
top.legend(loc="upper left")
bottom.plot([r["step"] for r in steps], [r["rollout/length_mean"] for r in steps], color="C1")
bottom.set(xlabel="PPO step", ylabel="response length (tokens)")
for axis in (top, bottom):
    axis.grid(alpha=0.3)
figure.savefig(run / "curve.png", dpi=120, bbox_inches="tight")

first, last = evals[0], evals[-1]
seconds = sum(row["time/step"] for row in steps)
before, after = first["eval/correct"], last["eval/correct"]
print(f"held-out accuracy, sampled at temperature 1: {before:.3f} before, {after:.3f} after {last['step']} steps")
print(f"{seconds / 60:.1f} minutes of PPO; the curve is in {run / 'curve.png'}, the samples in {run / 'samples.jsonl'}")
