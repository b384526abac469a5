"""When numbers have gone so bad that the run warns, or ends.

Owns: what is told of a number that is not finite, and the table of metrics with their limits.
Refuses to know: what is saved then (infra/run.py), hangs and signals (infra/watchdog.py), whether
the engine has the new weights (the canary of `sync` in ppo.py).
"""

import torch
from torch import Tensor

from infra import watchdog

# metric: (when it warns, after how many steps in a row the run stops, what it means). Edit freely
GUARDS = {
    "policy/approx_kl": (lambda x: x > 0.3, 20, "the policy jumps: lower --lr or --ppo_epochs"),
    "policy/entropy": (
        lambda x: x < 0.005,
        200,
        "the policy explores no more: lower --lr, raise --entropy_coef",
    ),
    "mismatch/logp_abs_mean": (
        lambda x: x > 0.1,
        20,
        "engine and trainer have other distributions: try --dtype fp32",
    ),
    "critic/explained_var": (
        lambda x: x < 0,
        200,
        "the critic is worse than a constant: raise --critic_warmup",
    ),
    "reward/std": (
        lambda x: x == 0,
        200,
        "all rewards are equal and teach nothing: look at the samples",
    ),
}


def bad_metrics(row: dict, streaks: dict[str, int], young: bool):
    """Of each metric of a step that GUARDS calls bad: the words for it, for how many steps in a row
    (counted in `streaks`), and at how many the run ends. A `young` critic may be wrong."""
    for name, (is_bad, limit, meaning) in GUARDS.items():
        excused = young and name.startswith("critic/")
        if name not in row or excused or not is_bad(row[name]):
            streaks[name] = 0
            continue
        streak = streaks[name] = streaks.get(name, 0) + 1
        told = f"step {row['step']}: {name} is {row[name]:.3g}, {streak} steps in a row: {meaning}"
        yield told, streak, limit


def not_finite(**tensors: Tensor | None) -> list[str]:
    """What each of the tensors that are not finite has, and where: nothing, when all are."""
    found = []
    for name, x in tensors.items():
        if x is None or torch.isfinite(x).all():
            continue
        bad = ~torch.isfinite(x)
        text = f"rank {watchdog.RANK}, {name}: {int(bad.sum())} of {x.numel()} not finite"
        if x.dim():
            text += f", first at {bad.nonzero()[0].tolist()}"
        found.append(text)
    return found
