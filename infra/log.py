"""What a run says and writes: without secrets, and whole.

Owns: the plan and the line of a step on the console, hiding what looks like a password or a token,
files that are complete or not there.
Refuses to know: where the numbers come from.
"""

import json
import math
import os
import re
from pathlib import Path

# names of environment variables whose values are secrets
SECRET_NAME = re.compile("TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY")

SECRET = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-)\w[\w-]{15,}"  # tokens of well-known places
    r"|(?<=://)[^/\s@\"]+(?=@)"  # what stands before an @ in an address
    r"|[?&]\w*(?i:token|key)=[^&\s\"]{8,}"  # a key in an address
)


def hide(text: str) -> str:
    """Without values of environment variables that are named like secrets, and without what looks
    like a token."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name.upper()):
            in_json = json.dumps(value)[1:-1]
            text = text.replace(value, f"<{name}>").replace(in_json, f"<{name}>")
    return SECRET.sub("<secret>", text)


def hidden(flags: dict) -> dict:
    """The same dictionary as it comes back from JSON, without secrets."""
    return json.loads(hide(json.dumps(flags)))


def say(text: str):
    print(hide(text), flush=True)


def write(path: Path, text: str):
    """All of it or, when the machine dies, what was there before."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "w") as file:
        file.write(text)
    to_disk(aside)
    os.replace(aside, path)


def to_disk(path: Path):
    """To the disk, not only to the system's memory; of a folder: its names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append(path: Path, text: str):
    """Adds text to a file; it is on the disk when this returns."""
    with open(path, "a") as file:
        file.write(text)
    to_disk(path)


# -------------------------------------------------------------------------------- what people read


PLAN = (
    "plan: {args.prompts_per_step} prompts x {args.samples_per_prompt} = {args.batch_size} samples "
    "a step; {args.ppo_epochs} epochs x {minibatches} minibatches of {args.minibatch} samples; "
    "micro-batches <= {tokens} tokens on {ranks.rows} x {ranks.sp} ranks; "
    "steps {start} to {args.steps}\nmade: {made}"
)


def plan(args, ranks, models: dict, made: dict, start: int) -> str:
    """The batch arithmetic, and what was chosen for the user."""
    made = made | {"engine": f"{args.engine} tp {args.tp}"}
    for name, model in models.items():
        made[name] = "none"
        if model:
            made[name] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"
    return PLAN.format(
        args=args,
        ranks=ranks,
        start=start,
        minibatches=args.batch_size // args.minibatch,
        tokens=args.max_tokens_per_microbatch * args.sp,
        made=", ".join(f"{name} {what}" for name, what in made.items()),
    )


LINE = (
    "step {step:4d}/{steps} | reward {reward/mean:.3f} correct {reward/correct:.3f} | "
    "len {rollout/length_mean:.0f} trunc {rollout/truncated_frac:.0%} | "
    "kl {policy/approx_kl:.4f} ent {policy/entropy:.2f} clip {clipped:.1%} "
    "gn {policy/grad_norm:.2f} ev {critic/explained_var:.2f} "
    "gap {mismatch/logp_abs_mean:.0e} mfu {perf/mfu:.0%} | "
    "{time/step:.1f}s = {phases} | eta {minutes:.0f}m"
)
NOT_TRAINED = {
    "policy/approx_kl": 0.0,
    "policy/entropy": 0.0,
    "policy/grad_norm": 0.0,
    "policy/clipfrac_low": 0.0,
    "policy/clipfrac_high": 0.0,
    "critic/explained_var": math.nan,
}


def line(row: dict, steps: int, seconds_per_step: float) -> str:
    """One step for people; fixed order, so that grep works."""
    row = NOT_TRAINED | row
    phases = [
        f"{key.removeprefix('time/')} {value:.1f}"
        for key, value in row.items()
        if key.startswith("time/") and key != "time/step"
    ]
    text = LINE.format(
        steps=steps,
        clipped=row["policy/clipfrac_low"] + row["policy/clipfrac_high"],
        phases=" + ".join(phases),
        minutes=seconds_per_step * (steps - row["step"]) / 60,
        **row,
    )
    if "eval/correct" in row:
        text += f" | eval {row['eval/correct']:.3f}"
    return text
