"""python tools/report.py RUN [RUN ...]: one page about runs, one file that needs no network.

Owns: reading run folders (config.json, metrics.jsonl, samples.jsonl), which runs are seeds of one
configuration, the data that the page shows (the page itself is report.html beside this file), and
the same curves as PNGs.

Refuses to know: how a run is made. It imports nothing of the trainer, and reads what is there while
a run goes on.

Left out on purpose: plotting libraries in the page (it draws its own SVG), a server (--watch writes
the file again and the page reloads itself), trust in samples: text of a model only ever becomes
text nodes, and the page may run no other script.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

Rows = list[dict]  # of metrics.jsonl or samples.jsonl, or one for each run
PAGE = Path(__file__).with_name("report.html")
SAMPLE_BYTES = (
    4_000_000  # in the page, all runs together; more are thinned out evenly over the steps
)
CURVE_POINTS = 1_000  # longer curves show means of neighbouring steps
TEXT_CHARS = 16_000  # of a prompt or response; longer ones lose their middle
FIELD_CHARS = 500  # of any other field of a sample
TOKENS = 2_048  # with numbers, of a sample: its last ones
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
DIGITS = [high + low for high in BASE64 for low in BASE64]  # of 0 to 4,095
IN_PAGE = ("name", "steps", "curves", "samples", "total", "bucket")  # what it has of each run
SHOWN_FIELDS = {"step", "prompt", "response", "tokens", "values", "advantages"}
# flags that say where, when and how, not what is learned
SAME = set(
    """
    out seed wandb wandb_id first_prompt rows steps plan resume save_every save_minutes keep_last
    keep_best max_minutes stall_minutes show_every profile max_tokens_per_microbatch max_seqs
    gradient_checkpointing offload replicas sp tp gpu_memory
    """.split()
)


@dataclass(frozen=True)
class Panel:
    """One drawing, and how its vertical axis lies."""

    title: str
    keys: list[str] | str  # of metrics.jsonl; in SECTIONS regular expressions that match whole ones
    low: float | None = None  # the axis reaches down to it
    floor: float | None = None  # the axis reaches no further down
    log: bool = False
    stack: bool = False  # layers on each other; one drawing for each group of runs


@dataclass(frozen=True)
class Section:
    name: str  # also of its PNG
    title: str
    panels: list[Panel]


SECTIONS = [
    Section(
        "reward",
        "Reward",
        [
            Panel("fraction correct", "reward/correct eval/(.+/)?correct", low=0),
            Panel("reward", "reward/mean"),
            Panel("response length (tokens)", "rollout/length_mean eval/(.+/)?length_mean"),
            Panel("share of the responses cut at the limit", "rollout/truncated_frac", low=0),
        ],
    ),
    Section(
        "policy",
        "Policy",
        [
            Panel("entropy (nats per token)", "policy/entropy"),
            Panel("KL(old policy || new) of an update", "policy/approx_kl"),
            Panel("share of the tokens clipped", "policy/clipfrac_low policy/clipfrac_high"),
            Panel("gradient norm", "policy/grad_norm"),
            Panel("KL to the reference", "policy/ref_kl"),
        ],
    ),
    Section(
        "critic",
        "Critic",
        [
            Panel("explained variance", "critic/explained_var", floor=-1),
            Panel("values", "critic/value_mean critic/value_min critic/value_max"),
            Panel("loss", "critic/loss"),
        ],
    ),
    Section(
        "calibration",
        "Critic calibration: does it expect what comes?",
        [
            Panel("1st quarter of the responses", "critic/value_q1 critic/return_q1"),
            Panel("2nd quarter of the responses", "critic/value_q2 critic/return_q2"),
            Panel("3rd quarter of the responses", "critic/value_q3 critic/return_q3"),
            Panel("4th quarter of the responses", "critic/value_q4 critic/return_q4"),
        ],
    ),
    Section(
        "mismatch",
        "Engine against trainer",
        [
            Panel("|log-prob gap|, mean", "mismatch/logp_abs_mean", log=True),
            Panel("|log-prob gap| after the sync (canary)", "mismatch/canary", log=True),
            Panel("KL(engine || trainer)", "mismatch/kl"),
        ],
    ),
    Section(
        "time",
        "Time",
        [
            Panel(
                "seconds of a step, by phase",
                "time/sample time/reward time/forward time/advantage "
                "time/update time/sync time/report time/save",
                stack=True,
            )
        ],
    ),
    Section(
        "perf",
        "Speed and memory",
        [
            Panel("tokens per second, whole step", "perf/tokens_per_s", low=0),
            Panel("MFU of the update", "perf/mfu", low=0),
            Panel("memory at the peak (GB)", "perf/peak_gb", low=0),
        ],
    ),
]
LABELS = {
    "critic/value_q1": "value",
    "critic/value_q2": "value",
    "critic/value_q3": "value",
    "critic/value_q4": "value",
    "critic/return_q1": "return",
    "critic/return_q2": "return",
    "critic/return_q3": "return",
    "critic/return_q4": "return",
    "critic/value_mean": "mean",
    "critic/value_min": "min",
    "critic/value_max": "max",
    "reward/correct": "training batch",
    "eval/correct": "held-out problems",
    "rollout/length_mean": "training batch",
    "eval/length_mean": "held-out problems",
    "policy/clipfrac_low": "too low",
    "policy/clipfrac_high": "too high",
}
# Okabe and Ito's, for all eyes
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #8a8a8a #F0E442".split()
DASHES = ["", "6 3", "2 2", "8 3 2 3"]

# ---- reading a run folder


def parse(line: bytes) -> dict | None:
    """One line of a .jsonl file. None where it is torn: the run may be writing it, or its machine
    may have died."""
    try:
        row = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    match row:
        case {"step": int()}:
            return row
    return None


def number(value) -> float | None:
    """Five digits of it. None for what no curve can show."""
    if isinstance(value, (int, float)) and abs(value) < 1e300:
        return float(f"{value:.5g}")
    return None


def read_run(folder: Path, budget: int = SAMPLE_BYTES, points: int = CURVE_POINTS) -> dict:
    """Flags, curves and as many samples as fit into `budget` bytes. ValueError where this is no
    run."""
    config = read_config(folder)
    rows = read_rows(folder / "metrics.jsonl")
    samples, total = read_samples(folder / "samples.jsonl", budget)
    return {
        "name": folder.resolve().name,
        "config": config,
        "rows": rows,
        "samples": samples,
        "total": total,  # samples in the file
        **thin(rows, points),
    }


def read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text(errors="replace"))
        config["prompts_per_step"]  # other folders have a config.json, too
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{str(folder)!r} is no run folder (config.json: {why}): expected one that ppo.py "
            "wrote, with metrics.jsonl; give what was --out of the run"
        ) from error
    return config


def read_rows(file: Path) -> Rows:
    """One row a step, in order. What a resumed run wrote again replaces what was there."""
    rows = {}  # by step
    if file.exists():
        with open(file, "rb") as lines:
            for row in filter(None, map(parse, lines)):
                rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def thin(rows: Rows, points: int) -> dict:
    """Curves of at most so many points, each the mean of `bucket` neighbouring steps: a power of
    two, so that those of a longer and a shorter run meet. Evaluations are rare and stay as they
    are."""
    bucket = 1
    while rows and bucket * points < rows[-1]["step"]:
        bucket *= 2
    found = {}  # key -> step -> what is averaged there
    for row in rows:
        for key, value in row.items():
            value = number(value)
            if key == "step" or value is None:
                continue
            step = row["step"]
            if not key.startswith("eval/"):
                step = math.ceil(step / bucket) * bucket
            found.setdefault(key, {}).setdefault(step, []).append(value)
    steps = sorted(set().union(*found.values()))
    curves = {}
    for key, values_at in found.items():
        means = {step: number(sum(values) / len(values)) for step, values in values_at.items()}
        curves[key] = [means.get(step) for step in steps]
    return {"bucket": bucket, "steps": steps, "curves": curves}


# ---- samples


def read_samples(file: Path, budget: int):
    """(samples, how many there are). The file of a long run is larger than memory: only the chosen
    lines are parsed."""
    if not file.exists():
        return [], 0
    with open(file, "rb") as lines:
        starts = list(accumulate(map(len, lines), initial=0))[:-1]
    few = pick(file, starts, min(len(starts), 40))
    wanted = min(len(starts), int(budget / size_in_page(few) * max(1, len(few))))
    while True:
        samples = pick(file, starts, wanted)
        used = size_in_page(samples)
        if used <= budget or wanted <= 1:
            break
        wanted = max(1, int(wanted * min(0.95, budget / used)))
    if wanted == len(starts):  # torn lines are no samples
        return samples, len(samples)
    return samples, len(starts)


def pick(file: Path, starts: list[int], count: int) -> Rows:
    """So many samples, evenly over the file, the first and the last among them."""
    samples = []
    with open(file, "rb") as lines:
        for i in range(count):
            lines.seek(starts[round(i * (len(starts) - 1) / max(1, count - 1))])
            row = parse(lines.readline())
            if row:
                samples.append(compact(row))
    return samples


def size_in_page(samples: Rows) -> int:
    return len(encode(samples).encode())


def compact(row: dict) -> dict:
    """A row of samples.jsonl as the page wants it. `tokens` are joined by DEL; `response` is what
    comes before the tokens, or (with `whole`) all of it where the tokens are not its end, as with
    characters that several tokens make up."""
    response = str(row.get("response", ""))
    sample = {
        "step": row["step"],
        "rest": {key: short(value) for key, value in row.items() if key not in SHOWN_FIELDS},
        "prompt": compact_prompt(row.get("prompt", "")),
    }
    tokens = row.get("tokens")
    if isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens):
        for name in ("values", "advantages"):
            numbers = row.get(name)
            if isinstance(numbers, list) and len(numbers) == len(tokens):
                sample[name] = pack(numbers[-TOKENS:])
        tokens = [token.replace("\x7f", "\ufffd") for token in tokens[-TOKENS:]]
        sample["tokens"] = "\x7f".join(tokens)
        # the last may be an end of sequence, which has no text in the response
        for ending in ("".join(tokens), "".join(tokens[:-1])):
            if response.endswith(ending):
                response = response.removesuffix(ending)
                break
        else:
            sample["whole"] = True
    sample["response"] = clip(response)
    return sample


def compact_prompt(prompt):
    """Text, or [role, text] of each message."""
    if not isinstance(prompt, list):
        return clip(str(prompt))
    messages = []
    for message in prompt:
        if not isinstance(message, dict):
            message = {"content": message}
        messages.append([str(message.get("role", "")), clip(str(message.get("content")))])
    return messages


def short(value):
    """Numbers that JavaScript holds exactly stay numbers; all else becomes text."""
    if isinstance(value, float):
        return number(value)
    if value is None or isinstance(value, int) and abs(value) < 2**53:
        return value
    return clip(str(value), FIELD_CHARS)


def clip(text: str, chars: int = TEXT_CHARS) -> str:
    if len(text) < chars + 200:
        return text
    left_out = f"\n[... {len(text) - chars:,} characters left out of this page ...]\n"
    return text[: chars // 2] + left_out + text[-chars // 2 :]


def pack(numbers: list) -> list:
    """[least, largest, two base64 digits each: 4,096 steps between them]. A third of the bytes of
    decimal digits."""
    numbers = [number(value) or 0.0 for value in numbers]
    least = min(numbers)
    largest = max(numbers)
    span = (largest - least) or 1
    digits = [DIGITS[round((value - least) / span * 4095)] for value in numbers]
    return [least, largest, "".join(digits)]


# ---- several runs


def configuration(config: dict) -> dict:
    """Flags that make a run what it is, but for its seed. Folders of models may be named after run
    or seed."""
    same = {flag: value for flag, value in config.items() if flag not in SAME}
    out = str(config.get("out")) or "\0"
    seed = rf"(?i)(seed\W?|_s|-s){config.get('seed')}(?!\d)"
    for flag in ("model", "critic_model"):
        if flag in same:
            same[flag] = re.sub(seed, r"\1*", str(same[flag]).replace(out, "OUT"))
    return same


def group_runs(runs: Rows):
    """[{name, runs: places}]: runs that differ in nothing but their seed are one group."""
    groups = {}  # configuration -> places of its runs
    for place, run in enumerate(runs):
        key = json.dumps(configuration(run["config"]), sort_keys=True)
        groups.setdefault(key, []).append(place)
    named = []
    for places in groups.values():
        names = [runs[place]["name"] for place in places]
        name = names[0]
        if len(names) > 1:
            common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", os.path.commonprefix(names))
            name = f"{common or name} ({len(names)} seeds)"
        named.append({"name": name, "runs": places})
    return named


def filled_sections(runs: Rows):
    """(sections and panels that have something to show, with their keys; keys that are in none)."""
    keys = set().union(*(run["curves"] for run in runs))
    used = {"time/step"}
    sections = []
    for section in SECTIONS:
        panels = []
        for panel in section.panels:
            matching = []
            for pattern in panel.keys.split():
                matching += [key for key in sorted(keys) if re.fullmatch(pattern, key)]
            if matching:
                panels.append(replace(panel, keys=matching))
                used.update(matching)
        if panels:
            sections.append(replace(section, panels=panels))
    return sections, sorted(keys - used)


def summary(run: dict) -> dict:
    """What the table at the top says of a run."""
    rows = run["rows"]
    config = run["config"]
    trained = [row for row in rows if "reward/mean" in row] or [{}]
    correct = [row["eval/correct"] for row in rows if "eval/correct" in row]
    return {
        "run": run["name"],
        "task": config.get("task"),
        "model": Path(str(config.get("model"))).name,
        "seed": config.get("seed"),
        "steps": rows[-1]["step"] if rows else 0,
        "reward": number(trained[-1].get("reward/mean")),
        "correct": number(trained[-1].get("reward/correct")),
        "held-out before": number(correct[0]) if correct else None,
        "after": number(correct[-1]) if len(correct) > 1 else None,
        "minutes": number(sum(row.get("time/step", 0) for row in rows) / 60),
    }


def differences(configs: Rows):
    """[flag, its value in each configuration] of the flags in which they differ."""
    flags = sorted(set().union(*configs))
    table = [[flag, *(str(config.get(flag)) for config in configs)] for flag in flags]
    return [row for row in table if len(set(row[1:])) > 1]


# ---- the page


def encode(data) -> str:
    """JSON that cannot end the element that it stands in: no text of a sample is ever seen as
    HTML."""
    text = json.dumps(
        data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=vars
    )
    text = text.replace("<", "\\u003c")
    return text.encode(errors="replace").decode()  # lone halves of surrogate pairs become ?


def build(runs: Rows, watch: int = 0) -> str:
    """report.html with the data in it; it reloads itself every `watch` seconds. Its policy names
    its own script and style by their hashes and forbids everything else."""
    groups = group_runs(runs)
    sections, others = filled_sections(runs)
    data = {
        "runs": [{field: run[field] for field in IN_PAGE} for run in runs],
        "table": [summary(run) for run in runs],
        "differs": differences([configuration(runs[g["runs"][0]]["config"]) for g in groups]),
        "groups": groups,
        "sections": sections,
        "others": others,
        "labels": LABELS,
        "colours": COLOURS,
        "dashes": DASHES,
        "watch": watch,
        "digits": BASE64,
    }
    page = PAGE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"@{tag}_hash@", digest)
    return page.replace("@DATA@", encode(data))  # last: nothing looks for a placeholder in it


# ---- PNGs


def running_means(run: dict, key: str, weight: float):
    """Step -> mean with exponentially falling weights, corrected for its start at 0."""
    means = {}
    mean = 0.0
    total = 0.0
    for step, value in zip(run["steps"], run["curves"][key]):
        if value is not None:
            mean = weight * mean + (1 - weight) * value
            total = weight * total + 1 - weight
            means[step] = mean / total
    return means


def band(members: Rows, key: str, weight: float):
    """(step, mean, min, max over the runs) at the steps that all runs with this key have, of
    running means; evaluations as they are."""
    if key.startswith("eval/"):
        weight = 0.0
    lines = [running_means(run, key, weight) for run in members if key in run["curves"]]
    if not lines:
        return []
    points = []
    for step in sorted(set.intersection(*map(set, lines))):
        values = [line[step] for line in lines]
        points.append((step, sum(values) / len(values), min(values), max(values)))
    return points


def draw(runs: Rows, folder: Path, weight: float) -> list[Path]:
    """A PNG for each section. `weight`, 0 to 0.95, is that of the past in running means."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = group_runs(runs)
    for group in groups:
        group["members"] = [runs[place] for place in group["runs"]]
    sections, _ = filled_sections(runs)
    paths = []
    for section in sections:
        path = folder / f"{section.name}.png"
        draw_section(section, groups, weight).savefig(path, dpi=120)
        paths.append(path)
    return paths


def draw_section(section: Section, groups: Rows, weight: float):
    from matplotlib.figure import Figure

    drawings = []  # (how, panel, the groups in it)
    for panel in section.panels:
        if panel.stack:
            drawings += [(draw_stack, panel, [group]) for group in groups]
        else:
            drawings.append((draw_lines, panel, groups))
    down = math.ceil(len(drawings) / 2)
    across = min(2, len(drawings))
    figure = Figure(figsize=(5.5 * across, 3.1 * down))
    for place, (draw_curves, panel, shown) in enumerate(drawings, 1):
        axis = figure.add_subplot(down, across, place)
        draw_curves(axis, panel, shown, weight)
        finish(axis, panel)
        if len(shown) < len(groups):
            axis.set_title(f"{panel.title}, {shown[0]['name']}")
    figure.suptitle(", ".join(group["name"] for group in groups), fontsize=10)
    figure.tight_layout()
    return figure


def draw_lines(axis, panel: Panel, groups: Rows, weight: float):
    """A colour for each group of runs or, where there is one, for each key; a dash for each key."""
    for g, group in enumerate(groups):
        for k, key in enumerate(panel.keys):
            points = band(group["members"], key, weight)
            if not points:
                continue
            steps, mean, least, largest = zip(*points)
            place = k
            label = []
            if len(groups) > 1:
                place = g
                label.append(group["name"])
            if len(panel.keys) > 1:
                label.append(LABELS.get(key, key))
            colour = COLOURS[place % len(COLOURS)]
            dash = DASHES[k % len(DASHES)].split()
            style = (0, list(map(float, dash))) if dash else "-"
            axis.plot(
                steps,
                mean,
                label=", ".join(label),
                color=colour,
                ls=style,
                marker="o" if key.startswith("eval/") else None,
                ms=4,
            )
            axis.fill_between(steps, least, largest, alpha=0.18, linewidth=0, color=colour)


def draw_stack(axis, panel: Panel, groups: Rows, weight: float):
    """Of the one group."""
    layers = []  # of each key: step -> mean
    for key in panel.keys:
        layers.append({step: mean for step, mean, *_ in band(groups[0]["members"], key, weight)})
    steps = sorted(set().union(*layers))
    heights = [[layer.get(step, 0) for step in steps] for layer in layers]
    labels = [key.removeprefix("time/") for key in panel.keys]
    axis.stackplot(steps, heights, labels=labels, colors=COLOURS)


def finish(axis, panel: Panel):
    axis.set(title=panel.title, xlabel="PPO step")
    if panel.log:
        axis.set_yscale("log")
    if panel.low is not None:
        axis.set_ylim(bottom=panel.low)
    if panel.floor is not None:
        axis.set_ylim(bottom=max(panel.floor, axis.get_ylim()[0]))
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, frameon=False)


# ---- the command line


def write(args: argparse.Namespace, watch: int):
    """The page, the PNGs, and what is said of them."""
    count = len(args.runs)
    points = max(1, min(CURVE_POINTS, 8 * CURVE_POINTS // count))
    runs = [read_run(folder, SAMPLE_BYTES // count, points) for folder in args.runs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{args.out}.new")
    new.write_text(build(runs, watch), encoding="utf-8")
    new.replace(args.out)  # a reader sees the old page or the new one
    paths = draw(runs, args.png, args.smooth) if args.png else []
    for row in map(summary, runs):
        accuracy = ""
        if None not in (row["held-out before"], row["after"]):
            accuracy = (
                f"held-out accuracy {row['held-out before']:.3f} before, {row['after']:.3f} after "
            )
        print(f"{row['run']}: {accuracy}{row['steps']} steps; {row['minutes']:.1f} minutes of PPO")
    for path in paths:
        print(f"curves: {path}")
    print(f"report: {args.out}", flush=True)


def stamps(folders: list[Path]):
    """What changes when a run goes on: times and sizes of its files."""
    found = []
    for folder in folders:
        for file in folder.glob("*.jsonl"):
            found.append((file.stat().st_mtime_ns, file.stat().st_size))
    return found


def watch_runs(args: argparse.Namespace):
    """Writes again whenever a run has gone on, until Ctrl-C; then a page that no longer reloads."""
    try:
        seen = None
        while True:
            now = stamps(args.runs)
            if now != seen:
                write(args, watch=10)
            seen = now
            time.sleep(2)
    except KeyboardInterrupt:
        write(args, watch=0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One page about runs: curves, critic, samples token by token."
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders; seeds of one become one band",
    )
    add("--out", type=Path, help="the page; default: report.html in the first run folder")
    add("--png", type=Path, metavar="FOLDER", help="the curves as PNGs too, with matplotlib")
    add("--smooth", type=float, default=0.0, help="of the PNGs: 0 to 0.95; the page has a slider")
    add("--watch", action="store_true", help="write again when a run has gone on, until Ctrl-C")
    args = parser.parse_args()
    if args.out is None:
        args.out = args.runs[0] / "report.html"
    return args


def main():
    args = parse_args()
    try:
        if args.watch:
            watch_runs(args)
        else:
            write(args, watch=0)
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
