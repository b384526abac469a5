"""A short form of tests/soak_run.py: what a run takes, it takes at the beginning, and it leaves no
process."""

from pathlib import Path

import soak_run

STEPS, YOUNG = 150, 50


def test_a_run_does_not_grow(tmp_path):
    """Guards days of training against what is forgotten in every step or checkpoint: tensors, files
    that stay open, threads, processes that outlive the run. Checkpoints every 5 steps, evaluations
    every 25."""
    flags = [
        *soak_run.toy_flags(tmp_path, STEPS),
        "--save_every",
        5,
        "--keep_last",
        2,
        "--eval_every",
        25,
    ]
    ranks, wrong = soak_run.soak(Path(tmp_path / "run"), 1, flags, YOUNG, seconds=300)
    assert not wrong
    assert [row["step"] for row in ranks[0]] == list(
        range(1, STEPS + 1)
    )  # it did look, after every step
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [
        "latest",
        f"step_{STEPS - 5}",
        f"step_{STEPS}",
    ]  # and nothing was left on the disk either
