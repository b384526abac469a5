"""How fast are the verifiers? python tools/bench/bench_rewards.py: ratios of things measured in the
same run.

1. programs: five tests each, against one fresh interpreter per test, one after the other as a plain
   loop runs them, and as many at a time as there are cores.
2. math: 1,000 ordinary answers with the processes warm.
3. hanging: a batch of 256 with 10 % of programs that never end, against the others alone.
"""

import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import rewards  # noqa: E402
from verify import pool  # noqa: E402

PROGRAM = """import sys, math, collections, heapq, itertools, functools, bisect, re
from typing import List

def solve(xs: List[int]) -> int:
    return sum(x * x for x in sorted(xs)) % 1_000_007

print(solve(list(map(int, sys.stdin.read().split()))))
"""
SECONDS = 1.0  # of a program on one test


def fenced(source: str) -> str:
    return f"```python\n{source}\n```"


def programs(count: int) -> tuple[list[str], list[dict]]:
    rng, rows = random.Random(count), []
    for _ in range(count):
        inputs = [[rng.randrange(1000) for _ in range(20)] for _ in range(5)]
        outputs = [str(sum(x * x for x in xs) % 1_000_007) for xs in inputs]
        rows.append(
            {
                "task": "code",
                "answer": {"inputs": [" ".join(map(str, xs)) for xs in inputs], "outputs": outputs},
            }
        )
    return [fenced(PROGRAM)] * count, rows


def answers(count: int) -> tuple[list[str], list[dict]]:
    """Integers, decimals, fractions, roots, polynomials, intervals and text, half of them wrong."""
    rng, texts, rows = random.Random(0), [], []
    for _ in range(count):
        a, b, wrong = rng.randrange(2, 99), rng.randrange(2, 99), rng.random() < 0.5
        gold, answer = rng.choices(
            [
                (str(a * b), str(a * b + wrong)),
                (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b + wrong}}}"),
                (f"{a}.{b}", f"{a}.{b + wrong}"),
                (rf"{a}\sqrt{{2}}", rf"\sqrt{{{2 * a * a + wrong}}}"),
                (f"(x+{a})^2", f"x^2+{2 * a}x+{a * a + wrong}"),
                (f"[{a},{a + b})", f"[{a}, {a + b + wrong})"),
                (r"\text{even}", "odd" if wrong else "even"),
                (rf"{a}\pi", rf"{a + wrong} \pi"),
            ],
            [40, 15, 10, 5, 5, 5, 10, 10],
        )[0]
        texts.append(rf"The sum is $2+2$, so \boxed{{{answer}}}.")
        rows.append({"task": "math", "answer": gold})
    return texts, rows


def seconds(texts: list[str], rows: list[dict]) -> tuple[float, float]:
    """(until all that do not hang have their result, until all have)"""
    begun, ends = time.perf_counter(), {}
    futures = rewards.submit(texts, rows)
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: ends.setdefault(i, time.perf_counter() - begun))
    statuses = [future.result()["status"] for future in futures]
    return max(
        ends[i] for i, status in enumerate(statuses) if status != "timeout"
    ), time.perf_counter() - begun


def fresh(rows: list[dict], at_a_time: int) -> float:
    """Seconds a test in new interpreters."""

    def run(job: tuple[str, str]) -> None:
        command = [sys.executable, "-I", "-c", job[0]]
        subprocess.run(command, input=job[1].encode(), stdout=subprocess.PIPE, check=True)

    jobs = [(PROGRAM, given) for row in rows for given in row["answer"]["inputs"]]
    begun = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as threads:
        list(threads.map(run, jobs))
    return (time.perf_counter() - begun) / len(jobs)


def main() -> dict[str, float]:
    rewards.TEST_SECONDS = SECONDS
    rewards.start({"math", "code"})
    # every worker starts its servers
    rewards.score(*answers(40))
    rewards.score(*programs(20))
    ours, loop, theirs = [], [], []
    for _ in range(5):
        ours.append(seconds(*programs(40))[1] / 200)
        loop.append(fresh(programs(8)[1], 1))
        theirs.append(fresh(programs(8)[1], pool.default_workers()))
    math = statistics.median(seconds(*answers(1000))[1] for _ in range(3))
    texts, rows = programs(256)
    hang = [fenced(s) for s in ("while True: pass", "import time\ntime.sleep(99)")]
    mixed = [hang[i % 20 // 10] if i % 10 == 0 else text for i, text in enumerate(texts)]
    honest = [(text, row) for text, row, m in zip(texts, rows, mixed) if text == m]
    alone, others, whole = [], [], []
    for _ in range(3):
        alone.append(seconds(*map(list, zip(*honest)))[0])
        quick, all_of_it = seconds(mixed, rows)
        others.append(quick)
        whole.append(all_of_it)
    hanging, workers = len(texts) - len(honest), pool.default_workers()
    waves = -(-hanging // workers)
    result = {
        "test_ms": 1000 * statistics.median(ours),
        "fresh_loop_ms": 1000 * statistics.median(loop),
        "fresh_parallel_ms": 1000 * statistics.median(theirs),
        "speedup_over_loop": statistics.median(a / b for a, b in zip(loop, ours)),
        "speedup_over_parallel": statistics.median(a / b for a, b in zip(theirs, ours)),
        "math_seconds_per_1000": math,
        "hanging_slowdown_of_others": statistics.median(others) / statistics.median(alone),
        "hanging_batch_seconds": statistics.median(whole),
        "hanging_batch_limit": waves * (2 * SECONDS + 1 + 2),
    }
    for name, value in result.items():
        print(f"{name:28s} {value:8.2f}")
    print(f"{workers} workers on {os.cpu_count()} cores")
    return result


if __name__ == "__main__":
    main()
