"""python show.py TITLE METRICS.jsonl [ENGINE.jsonl]: the numbers that matter of a run of ppo.py.

METRICS is metrics.jsonl of a run folder, ENGINE what job.py wrote."""

import json
import statistics
import sys
from pathlib import Path

COLUMNS = {
    "reward": "reward/mean",
    "canary": "mismatch/canary",
    "gap": "mismatch/logp_abs_mean",
    "gap max": "mismatch/logp_abs_max",
    "kl": "mismatch/kl",
    "entropy": "policy/entropy",
    "len": "rollout/length_mean",
    "sample tok/s": "rollout/tokens_per_s",
    "train tok/s": "perf/train_tokens_per_s",
    "mfu": "perf/mfu",
    "peak GB": "perf/peak_gb",
    "sample s": "time/sample",
    "forward s": "time/forward",
    "update s": "time/update",
    "sync s": "time/sync",
    "step s": "time/step",
}


def read(path: str) -> list[dict]:
    """The rows of a file; none if it is not there."""
    if not Path(path).exists():
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def steps(rows: list[dict]) -> None:
    print("step  " + "  ".join(f"{name:>12}" for name in COLUMNS))
    for row in rows:
        cells = []
        for key in COLUMNS.values():
            cells.append(f"{row[key]:12.4g}" if key in row else " " * 12)
        print(f"{row['step']:4}  " + "  ".join(cells))
    for row in rows:
        if "eval/correct" in row:
            print(f"held-out rows right after step {row['step']}: {row['eval/correct']:.3f}")


def engine(call: str, rows: list[dict]) -> None:
    """One line about all calls of one kind."""
    first = rows[0]
    later = rows[1:] or rows  # the first is longer
    median = statistics.median(row["s"] for row in later)
    text = f"{call}: {len(rows)} times, first {first['s']:.3f} s, then {median:.3f} s"
    if call in ("sleep", "wake", "start"):
        change = statistics.median(row["free_gb_after"] - row["free_gb_before"] for row in later)
        text += f"; free on the card {change:+.2f} GB, to {later[-1]['free_gb_after']:.2f}"
    if call == "start":
        facts = [f"{name} {value}" for name, value in first.items() if "gb" not in name]
        text += "; " + ", ".join(facts[2:])  # without the call and its seconds
    if call == "sample":
        most = max(row["answers"] for row in rows)
        large = [row for row in rows if row["answers"] == most]
        speed = statistics.median(row["tokens"] / row["s"] for row in large)
        equal = sum(row["equal_answers"] for row in large)
        nll = ", ".join(f"{row['nll']:.3f}" for row in large[:6])
        text += f"; {speed:.0f} tokens/s in the large batches"
        text += f"; answers to one prompt that are equal: {equal} of {most * len(large)}"
        text += f"; -log-prob of what was drawn {nll}"
        text += " (compare `entropy` above, of the same step)"
    print(text)


def main(title: str, metrics: str, calls: str = "") -> None:
    rows = [row for row in read(metrics) if "time/step" in row]
    print(f"\n==== {title}: {len(rows)} steps")
    if rows:
        steps(rows)
    found = read(calls) if calls else []
    for call in dict.fromkeys(row["call"] for row in found):
        engine(call, [row for row in found if row["call"] == call])


main(*sys.argv[1:])
