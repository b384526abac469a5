"""A long run of the verifiers, with 5 % attacks and processes killed at random.

    python tools/bench/soak_rewards.py [SAMPLES]

Prints what must stay flat (memory, descriptors, processes, zombies) every 2,000 samples and exits
with 1 when a result changed, a process stayed or something grew. 20,000 samples take about 5
minutes on 2 cores.
"""

import gc
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import attacks  # noqa: E402
from bench_rewards import answers, programs  # noqa: E402

import rewards  # noqa: E402
from verify import pool  # noqa: E402

BATCH = 500


def state() -> dict[str, int]:
    gc.collect()
    kilobytes = int(
        next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
    )
    below, zombies, sandboxes = attacks.descendants(os.getpid()), 0, 0
    for pid in below:
        try:
            zombies += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            line = next(line for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS"))
            sandboxes += int(line.split()[1])
        except (OSError, StopIteration):
            pass
    return {
        "trainer_mb": kilobytes // 1024,
        "sandboxes_mb": sandboxes // 1024,
        "processes": len(below),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "zombies": zombies,
    }


def batch(number: int, field: attacks.Field) -> tuple[list[str], list[dict], list[float | None]]:
    """BATCH texts, rows and what they must score: half math, 45 % programs, 5 % attacks."""
    rng, hostile = random.Random(number), list(attacks.sources().values())
    texts, rows = (list(x) + list(y) for x, y in zip(answers(BATCH // 2), programs(BATCH // 2)))
    broken = "```python\nprint(1)\n```"
    rights: list[float | None] = [None] * (BATCH // 2) + [1.0] * (BATCH // 2)
    for i in range(BATCH // 2, BATCH):
        if rng.random() < 0.1:
            texts[i], rights[i] = f"```python\n{rng.choice(hostile)}\n```", 0.0
            rows[i] = {"task": "code", "answer": {"inputs": [field.given], "outputs": ["escaped"]}}
        elif rng.random() < 0.3:
            texts[i], rights[i] = broken, 0.0
    order = rng.sample(range(BATCH), BATCH)
    return [texts[i] for i in order], [rows[i] for i in order], [rights[i] for i in order]


def killer(stop: threading.Event, kills: list[int]) -> None:
    rng = random.Random(1)
    while not stop.wait(rng.uniform(1.0, 5.0)):
        below = attacks.descendants(os.getpid())
        if below:
            try:
                os.kill(rng.choice(below), signal.SIGKILL)
                kills.append(1)
            except ProcessLookupError:
                pass


def main(samples: int) -> int:
    rewards.TEST_SECONDS = 0.3
    stop, kills, wrong, infra, begun = threading.Event(), [], [], 0, time.monotonic()
    with attacks.Field() as field:
        truth = {}  # of math answers: the verdict of an undisturbed first pass
        texts, rows = answers(BATCH // 2)
        for text, row, result in zip(texts, rows, rewards.score(texts, rows)):
            truth[text, row["answer"]] = result["correct"]
        rewards.score(*programs(20))
        first = state()
        print(0, first)
        threading.Thread(target=killer, args=(stop, kills), daemon=True).start()
        for number in range(samples // BATCH):
            texts, rows, rights = batch(number, field)
            for text, row, right, result in zip(texts, rows, rights, rewards.score(texts, rows)):
                expected = truth[text, row["answer"]] if right is None else right
                infra += result["status"] == "infra"
                if result["status"] != "infra" and result["correct"] != expected:
                    wrong.append((text[:300], expected, result))
            if number % max(1, 2000 // BATCH) == 0 or number == samples // BATCH - 1:
                print(
                    (number + 1) * BATCH,
                    state(),
                    f"{len(kills)} kills, {len(wrong)} wrong, {infra} infra",
                    flush=True,
                )
        stop.set()
        # the last killed ones are replaced
        rewards.score(*answers(40))
        rewards.score(*programs(40))
        leftovers = field.leftovers()
    last = state()
    print("last", last)
    rate = samples / (time.monotonic() - begun)
    print(f"{rate:.0f} samples a second; leftovers: {leftovers}; wrong: {wrong[:3]}")
    flat = (
        last["trainer_mb"] < first["trainer_mb"] + 20
        and last["sandboxes_mb"] < 1.3 * first["sandboxes_mb"] + 50
    )
    flat = (
        flat
        and last["descriptors"] <= first["descriptors"] + 4
        and last["threads"] <= pool.THREADS + 10
    )
    return int(bool(wrong or leftovers or last["zombies"] or infra > samples / 1000 or not flat))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
