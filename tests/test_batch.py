"""The order of rows and of tasks: data.batch on mixtures."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data


class Lazy:
    """A Sequence that counts how often it is read."""

    def __init__(self, task: str, size: int) -> None:
        self.task, self.size, self.reads = task, size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        self.reads += 1
        if not 0 <= i < self.size:
            raise IndexError(i)
        return {"id": f"{self.task}-{i}", "task": self.task}


def lazy(**sizes: int) -> dict[str, Lazy]:
    return {task: Lazy(task, size) for task, size in sizes.items()}


SIZES = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 30), min_size=1)
WEIGHTS = st.lists(st.sampled_from([0.001, 1 / 3, 0.8, 5]), min_size=5, max_size=5)


@given(SIZES, st.integers(1, 40), st.integers(0, 3), WEIGHTS | st.none())
def test_every_row_once_an_epoch(sizes, size, seed, weights):
    """Guards batches of another size, and rows that repeat or are never seen: for each task, whatever divides what."""
    rows, weights, seen = lazy(**sizes), weights and dict(zip(sizes, weights)), Counter()
    for step in range(4 * sum(sizes.values()) // size + 2):
        batch = data.batch(rows, step, size, seed, weights)
        seen.update(row["id"] for row in batch)
        assert len(batch) == size
        for task, count in sizes.items():
            times = [seen[f"{task}-{i}"] for i in range(count)]
            assert max(times) - min(times) <= 1


@given(SIZES, st.integers(1, 40), st.integers(0, 3))
def test_one_task_in_epochs(sizes, size, seed):
    """Guards an epoch that begins before the last one has ended."""
    for task, count in sizes.items():
        rows = lazy(**{task: count})
        ids = [row["id"] for step in range(3 * count) for row in data.batch(rows, step, size, seed)]
        assert all(len(set(ids[i : i + count])) == count for i in range(0, 3 * count * size, count))


def test_a_batch_is_a_function_of_the_step():
    """Guards a resume that repeats or skips a batch, and a seed that nobody reads."""
    rows, weights = lazy(a=50, b=70, c=9), {"a": 0.5, "b": 0.3, "c": 0.2}
    random.seed(1)
    straight = [data.batch(rows, step, 16, 5, weights) for step in range(40)]
    random.seed(2)
    data.order.cache_clear()  # a run that goes on has none
    for step in (39, 3, 20, 0):
        assert data.batch(lazy(a=50, b=70, c=9), step, 16, 5, weights) == straight[step]
    assert data.batch(rows, 3, 16, 6, weights) != straight[3]


MIXTURES = [
    {"a": 0.8, "b": 0.2},
    {"a": 0.999, "b": 0.001},
    {"a": 1, "b": 1, "c": 1},
    {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.07, "e": 0.03},
    {"a": 1e-3, "b": 1e3, "c": 1e3, "d": 1e3, "e": 1e3},
    {"a": 455, "b": 27},
    {"a": 7},
]


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
@pytest.mark.parametrize("steps, size", [(40, 256), (1_429, 7), (4_000, 1), (10, 1_000)])
def test_shares_are_kept_at_every_prefix(weights, steps, size):
    """Guards shares that are rounded in every batch (0.001 of 256 is none), drift, or are drawn by chance."""
    rows = {task: Lazy(task, 50 + 977 * i) for i, task in enumerate(weights)}
    total, seen, drawn = sum(weights.values()), Counter(), 0
    for step in range(steps):
        seen.update(row["task"] for row in data.batch(rows, step, size, 3, weights))
        drawn += size
        assert seen.total() == drawn
        for task, weight in weights.items():
            assert abs(seen[task] - drawn * weight / total) <= len(weights) + 0.002 * drawn, (
                task,
                step,
            )
    assert all(abs(seen[task] / drawn - weight / total) < 0.01 for task, weight in weights.items())


def test_without_weights_rows_count_and_batches_mix():
    """Guards a small task drawn as often as a big one, and tasks that come in blocks."""
    rows = lazy(a=9_000, b=3_000, c=500)
    drawn = [row for step in range(50) for row in data.batch(rows, step, 250)]
    counts = Counter(row["task"] for row in drawn)
    assert all(abs(counts[task] - len(rows[task])) <= 25 for task in rows)
    assert len({row["id"] for row in drawn}) >= 12_450
    tasks = [row["task"] for row in drawn[:250]]
    assert sum(x != y for x, y in zip(tasks, tasks[1:])) > 50


def test_a_batch_reads_its_own_rows_only():
    """Guards a step that walks through the whole file: 455,000 rows on disk."""
    rows, began = lazy(math=455_261, code=26_758), time.process_time()
    for step in (0, 1, 1_777, 20_000):
        assert len(data.batch(rows, step, 256, weights={"math": 0.8, "code": 0.2})) == 256
    assert rows["math"].reads + rows["code"].reads == 4 * 256 and time.process_time() - began < 8
