"""A short form of tools/bench/soak_run.py: what a run takes, it takes at the beginning, and it
leaves no process."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "bench"))
import soak_run  # noqa: E402


@pytest.mark.parametrize(
    "steps, young, every",  # the memory of the first steps still grows
    [(40, 20, 2), pytest.param(150, 50, 5, marks=pytest.mark.full)],
)
def test_a_run_does_not_grow(tmp_path, steps, young, every):
    """Guards days of training against what is forgotten in every step or checkpoint: tensors, files
    that stay open, threads, processes that outlive the run."""
    flags = soak_run.toy_flags(tmp_path, steps)
    flags += ["--save_every", every, "--keep_last", 2, "--eval_every", 5 * every]
    ranks, wrong = soak_run.soak(tmp_path / "run", 1, flags, young, seconds=600, limit=0.01)
    assert not wrong
    assert [row["step"] for row in ranks[0]] == list(range(1, steps + 1))  # it looked after each
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["latest", f"step_{steps - every}", f"step_{steps}"]  # and no more on the disk
